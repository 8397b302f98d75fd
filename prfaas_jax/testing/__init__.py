"""What tests and experiments share: a TCP relay that emulates a WAN, a profiled engine, random checkpoints."""
