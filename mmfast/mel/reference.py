"""The mel slice in plain PyTorch: fallback, oracle and baseline in one."""
