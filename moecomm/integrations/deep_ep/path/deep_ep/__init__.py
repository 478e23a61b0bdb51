"""What `import deep_ep` gives where this folder is first in PYTHONPATH: moecomm's drop-in."""

from moecomm.integrations.deep_ep import install

install(force=True)  # in place of this module, whose name it takes
