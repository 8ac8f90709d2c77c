"""Stock Stable-Baselines3 and sb3-contrib algorithms on text environments, see the README's section."""
