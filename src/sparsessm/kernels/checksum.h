// CRC32C, the checksum of packed files.
#pragma once
#include <cstddef>
#include <cstdint>

namespace sparsessm {

// Of some bytes that follow others, whose checksum is `before` (0: there are none). Safe on several threads.
uint32_t crc32c(uint32_t before, const uint8_t *data, size_t bytes, bool portable = false);

} // namespace sparsessm
