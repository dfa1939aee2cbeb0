/* Included first when llama.cpp is built. GCC's intrinsic does not say that it reads the configuration of the tile
   registers, so GCC 12 drops the stores that fill it, and the first product is killed (SIGILL; llama.cpp issue 20824). */
#if defined(__AMX_TILE__) && defined(__GNUC__) && !defined(__clang__)
#include <immintrin.h>
#undef _tile_loadconfig
#define _tile_loadconfig(config) __asm__ volatile("ldtilecfg %0" : : "m"(*(const char(*)[64])(config)))
#endif
