#include "CLibraries.h"

#include <xxhash.h>

uint64_t mg_xxh3(const void *data, size_t length, uint64_t seed) { return XXH3_64bits_withSeed(data, length, seed); }
uint64_t mg_xxh64(const void *data, size_t length) { return XXH64(data, length, 0); }
