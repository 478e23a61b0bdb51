"""Types of the sim world, by module of its library."""

from .shared.status import PHASES as PHASES
from .sim_world.cluster import Cluster as Cluster
from .sim_world.domain_cluster import DomainCluster as DomainCluster
from .sim_world.log import MUTANTS as MUTANTS
from .sim_world.program import Program as Program
