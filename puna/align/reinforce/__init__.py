"""Reinforcement learning on answers that the model draws itself: PPO, GRPO and RLOO."""
