"""The compiled CPU backend: csrc/ behind the operators' common signatures. Linears are oneDNN's, as in torch/."""
