import pytest

from dattrain.clock import duration
from dattrain.observe.throughput import Meter, peak_flops


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


def test_rates_are_over_the_window_and_leave_pauses_out():
    clock = Clock()
    meter = Meter(window=4, clock=clock)
    clock.now += 100  # the first update is slow: it leaves the window later
    meter.update(32, 0.0)
    assert meter.images_per_s == pytest.approx(0.32)
    for _ in range(4):
        clock.now += 2
        meter.update(32, 0.5)
    assert meter.images_per_s == pytest.approx(16)
    assert meter.data_wait == pytest.approx(0.25)
    clock.now += 50
    meter.pause(50)
    clock.now += 2
    meter.update(32, 0.5)
    assert meter.images_per_s == pytest.approx(16)
    assert meter.seconds_per_update == pytest.approx(2)


@pytest.mark.parametrize(
    "name, tflops",
    [
        ("NVIDIA H100 80GB HBM3", 989.4),
        ("NVIDIA H100 PCIe", 756.0),
        ("NVIDIA A100-SXM4-80GB", 311.8),
        ("NVIDIA A10G", 70.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA GeForce RTX 4090", 165.2),
        ("Tesla T4", 65.0),
        ("Some Other Device", None),
    ],
)
def test_peaks_are_found_by_name(name, tflops):
    found = peak_flops(name, "bf16")
    assert found == (None if tflops is None else pytest.approx(tflops * 1e12))
    assert peak_flops(name, "fp32") is None


@pytest.mark.parametrize(
    "seconds, text", [(0.4, "0:00"), (61, "1:01"), (3725, "1:02:05"), (97200, "1d 03:00")]
)
def test_durations(seconds, text):
    assert duration(seconds) == text
