"""The backend that runs everywhere: PyTorch operators chosen so that a row's bits don't depend on its company."""
