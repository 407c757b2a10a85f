"""What runs on tensors: the teacher, students, objectives and the training loop."""
