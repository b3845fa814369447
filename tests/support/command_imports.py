"""Everything both commands import, for the process that they are forked from; nothing is run."""

import medfl.shared.environment

# isort: split
import monai.networks.nets  # noqa: F401
import torch._dynamo  # noqa: F401 - torch.optim does, at its first step

import medfl.client.commands.node
import medfl.client.node
import medfl.client.runtime
import medfl.server.commands.serve
import medfl.server.coordinator  # noqa: F401
