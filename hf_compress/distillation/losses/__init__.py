"""The mathematics of distillation: functions of tensors, each a sum over its items."""
