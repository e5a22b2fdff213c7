"""The functions of this package by the names that reference.py has for them. Importing it imports Triton."""

from sparsessm.kernels.gpu.backward import selective_scan_backward as selective_scan_backward
from sparsessm.kernels.gpu.conv import causal_conv1d as causal_conv1d
from sparsessm.kernels.gpu.conv import causal_conv1d_backward as causal_conv1d_backward
from sparsessm.kernels.gpu.scan import selective_scan as selective_scan
from sparsessm.kernels.gpu.ssd import ssd_scan as ssd_scan
from sparsessm.kernels.gpu.stats import selective_scan_stats as selective_scan_stats
