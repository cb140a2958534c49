"""In which order are the cells computed? Policies: events and the view in, a plan out; pure, no clock, no I/O."""
