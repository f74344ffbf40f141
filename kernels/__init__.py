"""Device kernels of agentrt: KV block copy. Installed with the wheel as ``agentrt.kernels``."""
