// CRC32C (Castagnoli; RFC 3720, appendix B.4): the checksum of packed files. SSE 4.2 has an instruction for it, which
// is kept busy by three stretches side by side; without it, eight tables.
#include "checksum.h"

#include <array>
#include <cstring>
#if defined(SPARSESSM_X86)
#include "cpu.h"

#include <nmmintrin.h>
#endif

namespace sparsessm {

namespace {

constexpr uint32_t POLYNOMIAL = 0x82f63b78; // reflected
constexpr size_t STRETCH = 4096;            // bytes; a power of two

using Tables = std::array<std::array<uint32_t, 256>, 8>; // [k][byte]: the byte, followed by k zero bytes
using Shift = std::array<std::array<uint32_t, 256>, 4>;  // [k][byte]: byte k of a remainder, STRETCH zeros later

Tables make_tables() {
    Tables t{};
    for (uint32_t byte = 0; byte < 256; ++byte) {
        uint32_t rest = byte;
        for (int bit = 0; bit < 8; ++bit) rest = rest >> 1 ^ (rest & 1 ? POLYNOMIAL : 0);
        t[0][byte] = rest;
    }
    for (size_t k = 1; k < t.size(); ++k)
        for (uint32_t byte = 0; byte < 256; ++byte)
            t[k][byte] = t[k - 1][byte] >> 8 ^ t[0][t[k - 1][byte] & 255];
    return t;
}

const Tables &tables() {
    static const Tables made = make_tables();
    return made;
}

// A little-endian read on every machine.
uint32_t word(const uint8_t *p) {
    return uint32_t{p[0]} | uint32_t{p[1]} << 8 | uint32_t{p[2]} << 16 | uint32_t{p[3]} << 24;
}

uint32_t by_tables(uint32_t rest, const uint8_t *data, size_t bytes) {
    const Tables &t = tables();
    for (; bytes >= 8; data += 8, bytes -= 8) {
        const uint32_t low = rest ^ word(data), high = word(data + 4);
        rest = t[7][low & 255] ^ t[6][low >> 8 & 255] ^ t[5][low >> 16 & 255] ^ t[4][low >> 24] ^ t[3][high & 255] ^
               t[2][high >> 8 & 255] ^ t[1][high >> 16 & 255] ^ t[0][high >> 24];
    }
    for (; bytes; ++data, --bytes) rest = rest >> 8 ^ t[0][(rest ^ *data) & 255];
    return rest;
}

#if defined(SPARSESSM_X86)
// What STRETCH zero bytes make of each bit of a remainder: one zero byte's matrix, squared log2(STRETCH) times.
Shift make_shift() {
    std::array<uint32_t, 32> matrix{};
    const auto times = [&](uint32_t vector) {
        uint32_t sum = 0;
        for (int bit = 0; bit < 32; ++bit) sum ^= vector >> bit & 1 ? matrix[bit] : 0;
        return sum;
    };
    for (int bit = 0; bit < 32; ++bit) {
        const uint32_t one = uint32_t{1} << bit;
        matrix[bit] = one >> 8 ^ tables()[0][one & 255];
    }
    for (size_t zeros = 1; zeros < STRETCH; zeros *= 2) {
        std::array<uint32_t, 32> squared{};
        for (int bit = 0; bit < 32; ++bit) squared[bit] = times(matrix[bit]);
        matrix = squared;
    }
    Shift shift{};
    for (int k = 0; k < 4; ++k)
        for (uint32_t byte = 0; byte < 256; ++byte) shift[k][byte] = times(byte << (8 * k));
    return shift;
}

uint64_t eight(const uint8_t *p) {
    uint64_t value;
    std::memcpy(&value, p, 8);
    return value;
}

__attribute__((target("sse4.2,crc32"))) uint32_t by_instruction(uint32_t start, const uint8_t *data, size_t bytes) {
    static const Shift shift = make_shift();
    const auto later = [](uint64_t rest) {
        return uint64_t{shift[0][rest & 255] ^ shift[1][rest >> 8 & 255] ^ shift[2][rest >> 16 & 255] ^
                        shift[3][rest >> 24 & 255]};
    };
    uint64_t rest = start;
    for (; bytes >= 3 * STRETCH; data += 3 * STRETCH, bytes -= 3 * STRETCH) {
        uint64_t second = 0, third = 0;
        for (size_t i = 0; i < STRETCH; i += 8) {
            rest = _mm_crc32_u64(rest, eight(data + i));
            second = _mm_crc32_u64(second, eight(data + STRETCH + i));
            third = _mm_crc32_u64(third, eight(data + 2 * STRETCH + i));
        }
        rest = later(later(rest) ^ second) ^ third;
    }
    for (; bytes >= 8; data += 8, bytes -= 8) rest = _mm_crc32_u64(rest, eight(data));
    for (; bytes; ++data, --bytes) rest = _mm_crc32_u8(static_cast<uint32_t>(rest), *data);
    return static_cast<uint32_t>(rest);
}
#endif

} // namespace

uint32_t crc32c(uint32_t before, const uint8_t *data, size_t bytes, bool portable) {
#if defined(SPARSESSM_X86)
    static const bool known = cpu::sse42(); // asking takes as long as summing some kilobytes
    if (!portable && known) return ~by_instruction(~before, data, bytes);
#endif
    (void)portable;
    return ~by_tables(~before, data, bytes);
}

} // namespace sparsessm
