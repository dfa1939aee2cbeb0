// Memory for weights in pages of 2 MB, where the system has them: a step walks through all weights once, and every
// small page costs a search of the page tables. Small tensors share such pages.
#pragma once

#include <ATen/core/Tensor.h>
#include <ATen/ops/from_blob.h>
#include <sys/mman.h>

#include <algorithm>
#include <memory>
#include <mutex>

namespace trtkit {

struct Chunk {
  uint8_t* start;
  int64_t bytes, used = 0;
  explicit Chunk(int64_t size) : bytes(size) {
    void* got = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    TORCH_CHECK(got != MAP_FAILED, "trtkit_cpu: no memory for ", bytes, " bytes of weights");
    start = static_cast<uint8_t*>(got);
    madvise(start, bytes, MADV_HUGEPAGE);  // without it the pages are small ones
  }
  ~Chunk() { munmap(start, bytes); }
  Chunk(const Chunk&) = delete;
};

// ``bytes`` of memory, aligned to 64, that lives as long as the tensor. Contents: zeros.
inline at::Tensor huge_bytes(int64_t bytes) {
  constexpr int64_t PAGE = int64_t{1} << 21, LEAST = 32 * PAGE;
  static std::mutex lock;
  static std::weak_ptr<Chunk> open;  // the chunk that is not full; its tensors keep it
  const std::lock_guard<std::mutex> held(lock);
  std::shared_ptr<Chunk> chunk = open.lock();
  if (!chunk || chunk->bytes - chunk->used < bytes) {
    chunk = std::make_shared<Chunk>((std::max(bytes, LEAST) + PAGE - 1) / PAGE * PAGE);
    open = chunk;
  }
  uint8_t* start = chunk->start + chunk->used;
  chunk->used += (bytes + 63) / 64 * 64;
  return at::from_blob(start, {bytes}, [chunk](void*) {}, at::TensorOptions().dtype(at::kByte));
}

}  // namespace trtkit
