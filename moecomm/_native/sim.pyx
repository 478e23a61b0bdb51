# cython: language_level=3
# distutils: language=c++
"""The native sim world. Its parts are modules of this library. Each has one class, or functions only."""
from moecomm._native import core   # no-cython-lint - loads the parts that all worlds share
from moecomm._native.loading import load_parts

load_parts(__file__, "sim_world", ["log", "program", "cluster", "domain_cluster"])

from moecomm._native.shared.status import PHASES   # no-cython-lint
from moecomm._native.sim_world.cluster import Cluster   # no-cython-lint
from moecomm._native.sim_world.domain_cluster import DomainCluster   # no-cython-lint
from moecomm._native.sim_world.log import MUTANTS   # no-cython-lint
from moecomm._native.sim_world.program import Program   # no-cython-lint
