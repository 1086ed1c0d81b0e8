"""Distillation from end to end: a student trained to say what its teacher says, in one process or in many."""
