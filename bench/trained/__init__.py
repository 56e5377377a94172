"""What training makes of it: CIFAR-10 here, ImageNet for those who have it."""
