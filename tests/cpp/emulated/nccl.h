// Stands in for NCCL's headers on a CPU (nccl_device.h): see there.
#pragma once
