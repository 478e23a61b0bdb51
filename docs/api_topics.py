"""What goes on which API page. docs/make_api.py reads it."""

# page -> (title, what it has, names exported by moecomm, modules by the first or the last part of their dotted names)
TOPICS = {
    "communicator": (
        "Communicator",
        "How ranks find each other.",
        {"Communicator", "run_local"},
        {"env", "info"},
    ),
    "buffer": ("Buffer", "Dispatch and combine.", {"Buffer"}, set()),
    "results": (
        "Results and errors",
        "What the calls return and raise. [Errors](../errors.md) says what to do about each error.",
        {"Dispatched", "Handle", "Pending"},
        {"errors"},
    ),
    "decode": (
        "Decode",
        "Dispatch and combine with the least delay. [Decode](../decode.md) explains them.",
        set(),
        set(),
    ),
    "nn": (
        "Layers, gates and operators",
        "What a model uses. [Training](../training.md) shows how.",
        set(),
        {"nn", "gate", "ops", "overlap", "presets"},
    ),
    "balance": (
        "Balance",
        "Redundant experts. [Balance](../balance.md) explains them.",
        set(),
        {"balance"},
    ),
    "quant": (
        "Quantization",
        "FP8 and LogFMT of whole tensors. [Precision](../precision.md) explains the formats.",
        set(),
        {"quant"},
    ),
    "sim": (
        "Simulator and planner",
        "The protocol on a virtual clock. [Simulation](../simulation.md) and [Planning](../planning.md) explain it.",
        set(),
        {"sim", "clusters", "planner"},
    ),
    "tracing": (
        "Recording and tracing",
        "Recordings of real traffic and timelines. [Simulation](../simulation.md#recording) explains them.",
        set(),
        {"record", "trace", "tracing"},
    ),
    "integrations": (
        "Integrations",
        "The drop-in for `deep_ep` and the backend for transformers. [DeepEP](../deep_ep.md) lists the differences.",
        set(),
        {"integrations"},
    ),
    "testing": (
        "Testing",
        "The oracle: slow, obvious torch code that tests compare with.",
        set(),
        {"testing", "reference", "reference_quant"},
    ),
}
# Names without an underscore that are still not for users.
HIDDEN = {
    "arguments",
    "main",
    "raise_failure",
    "Ticket",
    "ticket_of",
    "number_buffer",
    "buffer_of",
    "wanted",
    "Started",
    "Runtime",
    "LowLatency",
    "describe_waiting",
    "refuse",
    "require_tensor",
    "wait_before",
    "event_of",
    "NativeCalls",
    "Recorder",
    "Segments",
    "ids_dtype",
}
