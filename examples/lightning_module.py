"""Lightning with a fused network: pip install lightning."""

import lightning
import torch

import fused_resnet as fr


class Classifier(lightning.LightningModule):
    """A network and what a step of it is."""

    def __init__(self) -> None:
        super().__init__()
        network = fr.cifar_resnet(20)  # fused from the start; fr.fuse(model) takes any other
        self.network = network.to(memory_format=torch.channels_last)

    def training_step(self, batch: list[torch.Tensor], index: int) -> torch.Tensor:
        """The loss of a batch."""
        images, labels = batch
        images = images.to(memory_format=torch.channels_last)
        return torch.nn.functional.cross_entropy(self.network(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """SGD with momentum."""
        return torch.optim.SGD(self.parameters(), lr=0.02, momentum=0.9)


torch.manual_seed(0)
data = torch.utils.data.TensorDataset(torch.randn(16, 3, 32, 32), torch.arange(16) % 10)
trainer = lightning.Trainer(
    max_epochs=1, accelerator="auto", logger=False, enable_checkpointing=False,
    enable_progress_bar=False, enable_model_summary=False,
)  # fmt: skip
trainer.fit(Classifier(), torch.utils.data.DataLoader(data, batch_size=8))
print(
    f"loss {trainer.callback_metrics.get('loss', torch.tensor(0.0))}, {trainer.global_step} steps"
)
