#include "subbyte/base/cpu_features.h"

#include <gtest/gtest.h>

#include <cstdlib>
#include <exception>
#include <iostream>
#include <stdexcept>

namespace subbyte {
namespace {

TEST(CpuFeatures, NamesOfAllSetsParseBack) {
  for (int i = 0; i < kIsaCount; ++i) EXPECT_EQ(isa_from_name(isa_name(Isa(i))), Isa(i));
}

TEST(CpuFeatures, AnUnknownNameIsRefusedWithTheKnownOnes) {
  for (const char* name : {"", "AVX2", "avx512vnni", "avx2 ", "sse2"}) {
    try {
      isa_from_name(name);
      FAIL() << "'" << name << "' was taken";
    } catch (const std::invalid_argument& e) {
      EXPECT_NE(std::string(e.what()).find("avx512_vnni"), std::string::npos) << e.what();
    }
  }
}

TEST(CpuFeatures, TheDetectedSetAgreesWithTheFeatureBits) {
  const CpuInfo info = cpu_info();
  const Isa isa = detected_isa();
  EXPECT_TRUE(isa < Isa::kAvx2 || (info.avx2 && info.fma && info.f16c));
  EXPECT_TRUE(isa < Isa::kAvx512 || (info.avx512f && info.avx512bw && info.avx512vbmi));
  EXPECT_TRUE(isa < Isa::kAvx512Vnni || (info.avx512vnni));
#if defined(__GNUC__) && defined(__x86_64__)
  __builtin_cpu_init();
  EXPECT_EQ(info.avx2, __builtin_cpu_supports("avx2") != 0);
  EXPECT_EQ(info.avx512f, __builtin_cpu_supports("avx512f") != 0);
  EXPECT_EQ(info.avx512vnni, __builtin_cpu_supports("avx512vnni") != 0);
#endif
}

TEST(CpuFeatures, AScopedSetHoldsForItsLifeAndNests) {
  const Isa before = active_isa();
  {
    ScopedIsa scalar(Isa::kScalar);
    EXPECT_EQ(active_isa(), Isa::kScalar);
    {
      ScopedIsa best(detected_isa());
      EXPECT_EQ(active_isa(), detected_isa());
    }
    EXPECT_EQ(active_isa(), Isa::kScalar);
  }
  EXPECT_EQ(active_isa(), before);
}

TEST(CpuFeatures, ASetTheMachineLacksIsRefused) {
  if (detected_isa() == Isa::kAvx512Vnni) GTEST_SKIP() << "this machine lacks none";
  EXPECT_THROW(ScopedIsa(Isa::kAvx512Vnni), std::invalid_argument);
}

// SUBBYTE_FORCE_ISA is read once a process, so each value is tried in a process of its own: with the "threadsafe" style a
// death test starts the program anew, and its statement runs before anything else asks for the set.
void report_active_isa(const char* value) {
  setenv("SUBBYTE_FORCE_ISA", value, 1);
  try {
    std::cerr << "active=" << isa_name(active_isa()) << std::endl;
  } catch (const std::invalid_argument& e) {
    std::cerr << "refused: " << e.what() << std::endl;
  }
  std::_Exit(0);
}

class ForcedByEnvironmentDeathTest : public ::testing::Test {
 protected:
  void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
};

TEST_F(ForcedByEnvironmentDeathTest, EveryAvailableSetIsTakenFromTheEnvironment) {
  for (int i = 0; i <= int(detected_isa()); ++i)
    EXPECT_EXIT(report_active_isa(isa_name(Isa(i))), ::testing::ExitedWithCode(0),
                std::string("active=") + isa_name(Isa(i)) + "\n");
}

TEST_F(ForcedByEnvironmentDeathTest, AnEmptyValueMeansWhatTheMachineHas) {
  EXPECT_EXIT(report_active_isa(""), ::testing::ExitedWithCode(0), std::string("active=") + isa_name(detected_isa()) + "\n");
}

TEST_F(ForcedByEnvironmentDeathTest, ABadNameOrAMissingSetIsRefusedAndNotReplaced) {
  EXPECT_EXIT(report_active_isa("avx1024"), ::testing::ExitedWithCode(0), "refused: unknown instruction set 'avx1024'");
  if (detected_isa() < Isa::kAvx512Vnni) {
    EXPECT_EXIT(report_active_isa("avx512_vnni"), ::testing::ExitedWithCode(0),
                "refused: SUBBYTE_FORCE_ISA=avx512_vnni is not available on this machine");
  }
}

}  // namespace
}  // namespace subbyte
