"""One thread for each test: the models are tiny, and threads that wait for each other only cost time."""

import torch


def pytest_configure(config):
    torch.set_num_threads(1)
