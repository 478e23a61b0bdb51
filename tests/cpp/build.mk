# C++ tests: every tests/cpp/NAME_test.cpp becomes build/cpp/FLAVOR/NAME_test, linked with all of csrc.
#
#   make test-cpp                           every program in every flavor it is meant for
#   make build/cpp/tsan/NAME_test           one of them
#   make test-cpp PY=python READY=          in an environment of your own instead of .venv
#
#   make arm-check                          the suites built for aarch64 and run under qemu-user, where both are installed
#
# Flavors: plain; tsan (ThreadSanitizer); asan (AddressSanitizer and UBSan). A test that has nothing to say under
# one of them lists itself in the CPP_NOT_ variable of that flavor. An extra flag for one program goes into its line
# CPP_FLAGS_NAME_test.
PY ?= python3
PYTHON ?= python3
READY ?=
CPP_FLAGS_device_rows_test := -iquote tests/cpp/emulated -Itests/cpp/emulated -Wno-maybe-uninitialized -Wno-uninitialized
CPP_FLAGS_device_world_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_device_decode_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_device_quant_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_device_graph_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_device_meeting_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_gin_world_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_own_role_test := $(CPP_FLAGS_device_rows_test) -iquote examples/roles
CPP_FLAGS_device_fault_test := $(CPP_FLAGS_device_rows_test)
CPP_FLAGS_nccl_host_test := $(CPP_FLAGS_device_rows_test)
CPP_TESTS := $(sort $(notdir $(basename $(wildcard tests/cpp/*_test.cpp))))
CPP_NOT_tsan := decode_runtime_test device_graph_test
CPP_NOT_asan := decode_runtime_test device_world_test device_decode_test device_graph_test gin_world_test
# Asked once, when the first rule needs it: before that the environment may not exist yet.
CPP_UCX = $(eval CPP_UCX := $(shell $(PY) -c 'import importlib.util as u, os; print(os.path.dirname(u.find_spec("libucx").origin))'))$(CPP_UCX)
CPP_FLAGS = -std=c++20 -ffp-contract=off -Wall -Wextra -Wno-psabi -pthread -Icsrc -Itests/cpp -I$(CPP_UCX)/include
CPP_FLAGS_plain := -O2
# Warnings are the plain build's: sanitizers make the compiler guess.
CPP_FLAGS_tsan := -Wno-maybe-uninitialized -O1 -g1 -fsanitize=thread
CPP_FLAGS_asan := -Wno-maybe-uninitialized -O1 -g1 -fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer
# UCX only where a test uses it: its memory hooks do not live with ThreadSanitizer.
CPP_LINK = -L$(CPP_UCX)/lib -Wl,-rpath,$(CPP_UCX)/lib -Wl,--as-needed -lucp -lucs
CPP_LIBRARY := $(shell $(PYTHON) tools/sources.py tests)
CPP_RUN_plain :=
# ThreadSanitizer of older compilers needs the memory layout without randomization.
CPP_RUN_tsan := TSAN_OPTIONS="halt_on_error=1 report_signal_unsafe=0" $(shell setarch -R true 2>/dev/null && echo setarch -R)
CPP_RUN_asan := ASAN_OPTIONS="detect_leaks=1"

# Another CPU: what runs there is the same C++, so its suites are built by a cross compiler and run by an emulator.
# No UCX: its library is opened when nodes are joined, and these tests join them inside one process.
ARM := aarch64-linux-gnu
build/cpp/arm/%: CXX = $(ARM)-g++
build/cpp/arm/%: CPP_LINK =
CPP_FLAGS_arm := -O2 -Wno-maybe-uninitialized
CPP_EMULATOR_arm := qemu-aarch64 -L /usr/$(ARM)
CPP_NOT_arm := $(filter device_% gin_% nccl_% own_role_test decode_runtime_test,$(CPP_TESTS))

.PHONY: test-cpp test-cpp-plain test-cpp-tsan test-cpp-asan
test-cpp: $(READY) ## the C++ suites: plain, ThreadSanitizer, AddressSanitizer with UBSan
	@$(MAKE) -s --no-print-directory -j$$(nproc) $(foreach f,plain tsan asan,cpp-build-$f)
	@$(MAKE) --no-print-directory test-cpp-plain test-cpp-tsan test-cpp-asan

define CPP_FLAVOR
.PHONY: cpp-build-$1
cpp-build-$1: $(foreach t,$(filter-out $(CPP_NOT_$1),$(CPP_TESTS)),build/cpp/$1/$t)
test-cpp-$1: cpp-build-$1
	@set -e; $(foreach t,$(filter-out $(CPP_NOT_$1),$(CPP_TESTS)),printf '%-24s' '$1/$t'; $(CPP_RUN_$1) timeout 300 $(CPP_EMULATOR_$1) build/cpp/$1/$t $(CPP_ARGUMENTS);) true
build/cpp/$1/%.o: csrc/%.cpp
	@mkdir -p $$(@D) && echo '$1 $$<'
	@$$(CXX) $$(CPP_FLAGS) $$(CPP_FLAGS_$1) -MMD -c $$< -o $$@
build/cpp/$1/%_test.o: tests/cpp/%_test.cpp
	@mkdir -p $$(@D) && echo '$1 $$<'
	@$$(CXX) $$(CPP_FLAGS) $$(CPP_FLAGS_$1) $$(CPP_FLAGS_$$(basename $$(notdir $$@))) -MMD -c $$< -o $$@
build/cpp/$1/%_test: build/cpp/$1/%_test.o build/cpp/$1/libmoecomm.a
	@$$(CXX) $(CPP_FLAGS_$1) -pthread $$^ $$(CPP_LINK) -o $$@
build/cpp/$1/libmoecomm.a: $(patsubst csrc/%.cpp,build/cpp/$1/%.o,$(CPP_LIBRARY))
	@rm -f $$@ && ar rcs $$@ $$^
endef
$(foreach f,plain tsan asan arm,$(eval $(call CPP_FLAVOR,$f)))

.PHONY: arm-check
arm-check: $(READY) ## the C++ suites for aarch64 under qemu-user; skipped where the cross compiler or the emulator is missing
	@if command -v $(ARM)-g++ qemu-aarch64 > /dev/null && $(ARM)-g++ --version > /dev/null; then \
	  $(MAKE) -s --no-print-directory -j$$(nproc) cpp-build-arm && $(MAKE) --no-print-directory test-cpp-arm; \
	else echo 'skipped: arm-check needs $(ARM)-g++ and qemu-aarch64 (Debian: g++-aarch64-linux-gnu, qemu-user)'; fi
# A header that has moved is in the .d files of objects built before: they are built again.
%.hpp %.inl %.cuh: ;
.PRECIOUS: build/cpp/plain/%_test.o build/cpp/tsan/%_test.o build/cpp/asan/%_test.o
-include $(shell find build/cpp -name '*.d' 2>/dev/null)
