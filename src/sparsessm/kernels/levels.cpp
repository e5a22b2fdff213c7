// Which of the levels this CPU can run.
#include "scan.h"

#if defined(SPARSESSM_X86)
#include "cpu.h"
#endif

#if defined(SPARSESSM_ARM) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(SPARSESSM_ARM) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

namespace sparsessm {

#if defined(SPARSESSM_ARM)
static bool multiplies_bytes() { // FEAT_DotProd: all of Apple's, most of others' since 2018
#if defined(__linux__)
    return getauxval(AT_HWCAP) & 1ul << 20; // HWCAP_ASIMDDP
#elif defined(__APPLE__)
    int found = 0;
    size_t size = sizeof found;
    return sysctlbyname("hw.optional.arm.FEAT_DotProd", &found, &size, nullptr, 0) == 0 && found;
#else
    return false;
#endif
}
#endif

std::vector<const Level *> supported() {
    std::vector<const Level *> levels{&portable_level()};
#if defined(SPARSESSM_X86)
    if (cpu::avx2()) levels.push_back(&avx2_level());
    if (cpu::avx512()) levels.push_back(&avx512_level());
    if (cpu::vbmi2()) levels.push_back(&avx512vbmi2_level());
#elif defined(SPARSESSM_ARM)
    if (multiplies_bytes()) levels.push_back(&dotprod_level());
#endif
    return levels;
}

} // namespace sparsessm
