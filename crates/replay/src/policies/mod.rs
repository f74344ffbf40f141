//! Baselines, the optimum, the oracles and the adapter to agentrt's own policy.
