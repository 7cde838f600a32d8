"""Networks for ten classes of 32 x 32 images, and their test; none draws random numbers while it trains, so a resumed run repeats."""

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from experiments.data import import_torchvision

# Of 32 x 32 images in three colours; there is also "mnist_mlp".
MODELS = ("resnet18", "resnet18_3x3", "vgg11_bn", "mobilenet_v2", "mlp", "tiny")
TEST_BATCH = 250


def make_model(name, seed):
    """Return the network `name` on the CPU in fp32, its start weights decided by the seed; entries in brackets.

    resnet18: torchvision's, with its 7 x 7 stem (11,181,642). resnet18_3x3: with a 3 x 3 stem and no first pooling, as
    is usual for CIFAR-10 (11,173,962). vgg11_bn: torchvision's layers, averaged to 1 x 1 before one linear layer
    (9,231,114). mobilenet_v2: torchvision's without dropout (2,236,682). mlp: 128 hidden units (394,634). tiny: two layers with BatchNorm, for tests
    (1,906). mnist_mlp: 128 hidden units for 28 x 28 grey images (101,770).
    """
    torch.manual_seed(seed)
    if name == "tiny":
        convolution = nn.Conv2d(3, 8, 5, stride=4, bias=False)
        return nn.Sequential(convolution, nn.BatchNorm2d(8), nn.ReLU(), nn.MaxPool2d(2, ceil_mode=True), nn.Flatten(), nn.Linear(128, 10))
    if name == "mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(3 * 32 * 32, 128), nn.ReLU(), nn.Linear(128, 10))
    if name == "mnist_mlp":
        return nn.Sequential(nn.Flatten(), nn.Linear(28 * 28, 128), nn.ReLU(), nn.Linear(128, 10))
    models = import_torchvision().models
    if name == "resnet18_3x3":
        model = models.resnet18(num_classes=10)
        model.conv1 = nn.Conv2d(3, 64, 3, padding=1, bias=False)
        nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
        model.maxpool = nn.Identity()
        return model
    if name == "vgg11_bn":
        model = models.vgg11_bn(num_classes=10)
        model.avgpool = nn.AdaptiveAvgPool2d(1)
        model.classifier = nn.Linear(512, 10)
        nn.init.normal_(model.classifier.weight, 0, 0.01)  # as torchvision starts its own
        nn.init.zeros_(model.classifier.bias)
        return model
    if name == "mobilenet_v2":
        return models.mobilenet_v2(num_classes=10, dropout=0.0)
    return models.resnet18(num_classes=10)


def test(model, dataset, images=slice(None)):
    """Return how many of the chosen test images the model takes for what they are, and the sum of its losses on them (nats).

    The model is in training mode before and after.
    """
    correct, loss, device = 0, 0.0, next(model.parameters()).device
    model.eval()
    with torch.no_grad():
        for some, labels in zip(dataset.test_images[images].split(TEST_BATCH), dataset.test_labels[images].split(TEST_BATCH)):
            scores, labels = model(dataset.normalise(some).to(device)), labels.to(device)
            correct += (scores.argmax(dim=1) == labels).sum().item()
            loss += cross_entropy(scores, labels, reduction="sum").item()
    model.train()
    return correct, loss
