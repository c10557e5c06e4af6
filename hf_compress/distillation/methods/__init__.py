"""One distillation method a file: its paper, equation, configuration and trainer."""
