// Asymmetric numeral systems for the integer codes of matrices on the dial (docs/sparse-format.md, kind "ans").
#pragma once
#include <cstdint>
#include <vector>

namespace sparsessm::entropy {

constexpr int TOKENS = 60;      // magnitudes of codes, from 16 on several to a token
constexpr int MOST_TABLES = 16;

// Codes (rows, cols) and what says which table each has: classes of rows and columns, and how many tables there are.
struct Codes {
    const int16_t *codes;
    int64_t rows, cols;
    const uint8_t *by_row, *by_column;
    int tables; // 1, 2, 4, 8 or 16; a class is below
};

// How often each token is coded with each table: (tables, TOKENS).
std::vector<int64_t> tally(const Codes &, int threads);

// The class of each row with which it costs least, at these prices (tables, TOKENS) of tokens. Does not read by_row.
void assign(const Codes &, const int32_t *prices, uint8_t *by_row, int threads);

// The stream of codes, and where each group of `together` rows ends in it; tables as the file has them. Throws
// std::invalid_argument for a token without a frequency.
std::vector<uint8_t> encode(const Codes &, const std::vector<uint8_t> &tables, int64_t together, int64_t *ends,
                            int threads);

// The reverse. Reads nothing outside of the stream, whatever it holds; throws std::invalid_argument, with what is wrong,
// where nobody could have written it or the tables. `ends` rises to the end of the stream.
void decode(const Codes &, const std::vector<uint8_t> &tables, const uint8_t *stream, const int64_t *ends,
            int64_t together, int16_t *codes, int threads);

} // namespace sparsessm::entropy
