"""transformers' Trainer with a fused network: pip install transformers accelerate."""

import torch
import transformers

import fused_resnet as fr

torch.manual_seed(0)
config = transformers.ResNetConfig(
    embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic", num_labels=3
)
model = fr.fuse(transformers.ResNetForImageClassification(config))  # or .from_pretrained(...)

images, labels = torch.randn(16, 3, 32, 32), torch.arange(16) % 3
data = [{"pixel_values": x, "labels": y} for x, y in zip(images, labels, strict=True)]

arguments = transformers.TrainingArguments(
    output_dir="trainer",
    max_steps=2,
    per_device_train_batch_size=8,
    learning_rate=1e-3,
    report_to=[],
    use_cpu=not torch.cuda.is_available(),
)
trainer = transformers.Trainer(model=model, args=arguments, train_dataset=data)
print(f"loss {trainer.train().training_loss:.4f}")
trainer.save_model("trainer/last")  # the library's keys: from_pretrained reads them
