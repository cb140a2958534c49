"""The command line, the front door of the house: one file a verb."""
