// The tile registers of a CPU with matrix units (AMX): asking for them, their shapes, and what GCC does not know.
#pragma once

#include "lines.h"

#ifdef TRTKIT_TILES
#include <sys/syscall.h>
#include <unistd.h>

#include <initializer_list>

namespace trtkit {

// As the CPU reads them: palette 1, from the start, then bytes of a row and rows of each tile.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start = 0, none[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

}  // namespace trtkit

#ifdef TRTKIT_TILE_UNIT
#include TRTKIT_TILE_UNIT  // in software, for tests
#else
namespace trtkit {

// Whether this process may use them: Linux gives them on request.
inline bool tiles_ready() {
  constexpr long REQUEST = 0x1023, TILE_DATA = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  static const bool given = syscall(SYS_arch_prctl, REQUEST, TILE_DATA) == 0;
  return given;
}

inline void configure(const TileShapes& shapes) { asm volatile("ldtilecfg %0" : : "m"(shapes)); }
inline void release() { _tile_release(); }

}  // namespace trtkit
#endif

namespace trtkit {

// Tiles of 16 rows of 64 bytes, but for those named, which have ``rows``; for the life of the object.
struct Configured {
  Configured(std::initializer_list<int> tiles, int64_t rows) {
    TileShapes shapes;
    for (const int tile : tiles) shapes.rows[tile] = static_cast<uint8_t>(rows);
    configure(shapes);
  }
  ~Configured() { release(); }
  Configured(const Configured&) = delete;
};

// GCC does not know that tile instructions read memory: without this it may drop the stores before them, or move them.
inline void settle() { asm volatile("" ::: "memory"); }

}  // namespace trtkit
#endif
