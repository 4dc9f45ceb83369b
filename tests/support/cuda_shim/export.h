// How Python reaches a kernel that was compiled for the CPU: run_NAME launches it, parameters_NAME tells its
// parameters' sizes.
#pragma once
#include "shim.h"

template <class... Parameters>
int parameter_sizes(void (*)(Parameters...), int* sizes) {
    int count = 0;
    ((sizes[count++] = int(sizeof(Parameters))), ...);
    return count;
}

#define EXPORT(name)                                                                                                \
    extern "C" const char* run_##name(const unsigned* grid, const unsigned* block, size_t shared, void** arguments, \
                                      uint64_t seed) {                                                              \
        return sim::launch(name, grid, block, shared, arguments, seed);                                             \
    }                                                                                                               \
    extern "C" int parameters_##name(int* sizes) { return parameter_sizes(name, sizes); }
