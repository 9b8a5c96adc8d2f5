"""An HTTP service whose requests share batches: one thread runs the network, many clients wait.

fused-resnet freeze resnet50 --weights resnet50.pth --out served.safetensors
MODEL=served.safetensors uvicorn --factory serve_fastapi:create_app
curl --data-binary @cat.jpg http://127.0.0.1:8000/classify
"""

import asyncio
import os
import queue
import threading
from concurrent.futures import Future

import torch
from fastapi import FastAPI, HTTPException, Request
from torchvision.io import ImageReadMode, decode_image

import fused_resnet as fr


class Batcher:
    """Runs what is waiting as one batch: a single image at low load, ``largest`` at high load."""

    def __init__(self, model: torch.nn.Module, largest: int = 8) -> None:
        self.model, self.largest = model, largest
        self.waiting: queue.Queue[tuple[torch.Tensor, Future]] = queue.Queue()
        threading.Thread(target=self.run, daemon=True).start()

    def run(self) -> None:
        while True:
            batch = [self.waiting.get()]
            while len(batch) < self.largest and not self.waiting.empty():
                batch.append(self.waiting.get())
            # A client that has gone cancels its answer.
            batch = [item for item in batch if item[1].set_running_or_notify_cancel()]
            if batch:
                with torch.inference_mode():
                    rows = self.model(torch.stack([image for image, _ in batch])).softmax(1)
                for (_, answer), row in zip(batch, rows, strict=True):
                    answer.set_result(row)


def create_app() -> FastAPI:
    model = fr.load_frozen(os.environ["MODEL"])  # with labels and preprocessing, if it was given
    app, batcher = FastAPI(), Batcher(model)

    @app.post("/classify")
    async def classify(request: Request) -> dict[str, str | float]:
        data = torch.frombuffer(bytearray(await request.body()), dtype=torch.uint8)
        try:
            image = await asyncio.to_thread(decode_image, data, ImageReadMode.RGB)
        except RuntimeError:
            raise HTTPException(400, "the body is not a JPEG or PNG image") from None
        batcher.waiting.put((model.preprocessing(image), answer := Future()))
        probability, label = (await asyncio.wrap_future(answer)).max(0)
        return {"label": model.labels[label], "probability": float(probability)}

    return app
