// Wrappers for the variadic functions, function-like macros and inline functions of Debian's libraries.
#ifndef MARGARINE_CLIBRARIES_H
#define MARGARINE_CLIBRARIES_H

#include <stddef.h>
#include <stdint.h>

/// XXH3 64-bit of `length` bytes with `seed`.
uint64_t mg_xxh3(const void *data, size_t length, uint64_t seed);
/// XXH64 of `length` bytes with seed 0: what btrfs calls csum type 1.
uint64_t mg_xxh64(const void *data, size_t length);

#endif
