"""What people run: training under torchrun, framework launchers, benchmarks. Nothing imports it."""
