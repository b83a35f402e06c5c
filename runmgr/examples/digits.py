"""Train a small CNN on handwritten digits, data-parallel, and average its ten best epochs.

    torchrun --standalone --nproc-per-node=2 -m runmgr.examples.digits

Start it again with --resume latest after it was stopped or killed, and it goes on where it was.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset
from tqdm import tqdm

import runmgr

Average = runmgr.BestAverage | runmgr.RunningAverage | runmgr.ExponentialAverage


def parse_arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--batch-size", type=int, default=32, help="images per rank and step")
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--average", choices=("best", "running", "exponential"), default="best")
    parser.add_argument("--experiment", default="digits")
    parser.add_argument("--resume", choices=("auto", "latest", "never"), default="auto")
    return parser.parse_args()


def split_digits() -> tuple[TensorDataset, TensorDataset, TensorDataset]:
    """Return train (1,197), validation (300) and test (300) sets of 8x8 images; the same split every time."""
    images, labels = load_digits(return_X_y=True)
    pixels = torch.from_numpy(images).float().div(16).reshape(-1, 1, 8, 8)
    targets = torch.from_numpy(labels)
    order = torch.randperm(len(targets), generator=torch.Generator().manual_seed(0))
    train, validation, test = (
        TensorDataset(pixels[part], targets[part]) for part in order.split([len(order) - 600, 300, 300])
    )
    return train, validation, test


def build_model() -> nn.Module:
    """Return a CNN with 28,000 parameters."""
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1), nn.BatchNorm2d(32), nn.ReLU(), nn.MaxPool2d(2),
        nn.Dropout(0.2), nn.Flatten(), nn.Linear(32 * 4 * 4, 44), nn.ReLU(), nn.Linear(44, 10),
    )  # fmt: skip


def build_average(kind: str, model: nn.Module) -> Average:
    """Return the average that --average names."""
    if kind == "best":
        return runmgr.BestAverage(model, k=10, mode="max")
    if kind == "running":
        return runmgr.RunningAverage(model)
    return runmgr.ExponentialAverage(model, decay=0.9)


@torch.no_grad()
def evaluate(model: nn.Module, data: TensorDataset) -> float:
    """Return the share of right answers over the whole set; each rank looks at its part."""
    model.eval()
    device = next(model.parameters()).device
    images, labels = (part[dist.get_rank() :: dist.get_world_size()].to(device) for part in data.tensors)
    right: Tensor = (model(images).argmax(1) == labels).sum()
    dist.all_reduce(right)
    return right.item() / len(data)


def train(run: runmgr.Run, args: argparse.Namespace, device: torch.device) -> None:
    """Train, save every epoch, and evaluate the last weights and their average on the test set."""
    torch.manual_seed(args.seed)
    train_data, validation_data, test_data = split_digits()
    sampler: DistributedSampler[tuple[Tensor, ...]] = DistributedSampler(train_data, seed=args.seed)
    loader = DataLoader(train_data, args.batch_size, sampler=sampler)
    run.logger.info("rank %d trains on %d images an epoch, on %s", run.rank, len(sampler), device)

    model = build_model().to(device)
    ddp = DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=args.lr)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    average = build_average(args.average, model)
    state = {"net": ddp, "optimizer": optimizer, "scheduler": scheduler, "average": average}

    progress = run.restore(state)
    step = progress.step
    epochs = tqdm(desc="epochs", total=args.epochs, initial=progress.epoch, disable=not run.is_main)
    for epoch in range(progress.epoch, args.epochs):
        sampler.set_epoch(epoch)
        ddp.train()
        for images, labels in loader:
            loss = functional.cross_entropy(ddp(images.to(device)), labels.to(device))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            if run.should_stop():
                return  # this epoch is done again after a restart
        scheduler.step()
        accuracy = evaluate(model, validation_data)
        if isinstance(average, runmgr.BestAverage):
            average.update(accuracy)
        else:
            average.update()
        run.log_scalars({"train/loss": loss, "val/accuracy": accuracy}, step=step)
        run.save(state, epoch=epoch + 1, step=step, metrics={"val/accuracy": accuracy})
        epochs.set_postfix(loss=f"{loss.item():.3f}", val=f"{accuracy:.1%}", refresh=False)
        epochs.update()
    epochs.close()
    report(run, model, average, test_data, step)


def report(run: runmgr.Run, model: nn.Module, average: Average, test_data: TensorDataset, step: int) -> None:
    """Evaluate the last weights and their average on the test set, and save the average."""
    last = evaluate(model, test_data)
    with average.applied():
        averaged = evaluate(model, test_data)
    path = run.save_average(average)
    run.log_scalars({"test/accuracy": last, "test/accuracy_of_average": averaged}, step=step)
    if run.is_main:
        print(f"test accuracy: {last:.2%} after the last epoch, {averaged:.2%} for the {type(average).__name__}")
        print(f"averaged model: {path}")
        print(f"run directory: {run.run_dir}")


def main() -> None:
    """Open the process group and the run, and train."""
    args = parse_arguments()
    local_rank, ranks_here = int(os.environ["LOCAL_RANK"]), int(os.environ["LOCAL_WORLD_SIZE"])
    if torch.cuda.is_available():
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
        backend = "nccl" if torch.cuda.device_count() >= ranks_here else "gloo"
    else:
        device, backend = torch.device("cpu"), "gloo"
    dist.init_process_group(backend)
    try:
        with runmgr.start_run(
            args.experiment,
            config=args,
            resume=args.resume,
            monitor="val/accuracy",
            keep=runmgr.Keep(every_n_epochs=10),
        ) as run:
            train(run, args, device)
    finally:
        dist.destroy_process_group()


if __name__ == "__main__":
    main()
