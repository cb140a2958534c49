"""Which keys does a cell read? Planners: one file a method, rows and keys in, an `AttnPlan` out."""
