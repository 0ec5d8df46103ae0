"""The model, its training, and each partition's data."""

import torch
import torch.nn as nn
import torch.nn.functional as F  # noqa: N812
from torch.utils.data import DataLoader, TensorDataset, random_split


class Net(nn.Module):
    """A small convolutional network for 8 x 8 images of ten noisy patterns."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 8, 3, padding=1)
        self.pool = nn.MaxPool2d(2, 2)
        self.fc = nn.Linear(8 * 4 * 4, 10)

    def forward(self, x):
        x = self.pool(F.relu(self.conv(x)))
        return self.fc(x.flatten(1))


def load_data(partition_id: int, num_partitions: int, batch_size: int):
    """Load partition data."""
    patterns = torch.rand(10, 1, 8, 8, generator=torch.Generator().manual_seed(42))
    generator = torch.Generator().manual_seed(43 + partition_id)
    targets = torch.randint(10, (1000 // num_partitions,), generator=generator)
    images = patterns[targets] + 0.2 * torch.randn(len(targets), 1, 8, 8, generator=generator)
    train, test = random_split(TensorDataset(images, targets), [0.8, 0.2], generator=generator)
    return DataLoader(train, batch_size=batch_size, shuffle=True, generator=generator), DataLoader(test, 64)


def train(net, trainloader, epochs, lr):
    """Train the model on the training set."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    running_loss = 0.0
    net.train()
    for _ in range(epochs):
        for images, labels in trainloader:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(images), labels)
            loss.backward()
            optimizer.step()
            running_loss += loss.item()
    return running_loss / len(trainloader)


def test(net, testloader):
    """Validate the model on the test set."""
    correct, loss = 0, 0.0
    net.eval()
    with torch.no_grad():
        for images, labels in testloader:
            outputs = net(images)
            loss += F.cross_entropy(outputs, labels).item()
            correct += (outputs.argmax(1) == labels).sum().item()
    return loss / len(testloader), correct / len(testloader.dataset)
