"""What the mirror calls at run time where an operator isn't one function of torch: plain differentiable functions of
tensors, and modules for control flow. Imported only when a mirror is built."""
