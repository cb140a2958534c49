"""The loop between the parts: events to plans, plans to passes over the layers, passes to events and tokens."""
