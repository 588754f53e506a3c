# The gate. Its kernels are compiled once for each instruction set; which one runs is decided when it is first used.
set(gating_options -Wall -Wextra -ffp-contract=off -fno-math-errno)   # no contraction: see gating/score.h

function(gating_kernels name)
  add_library(gating_${name} OBJECT cpu/gating_kernels.cpp)
  target_compile_features(gating_${name} PRIVATE cxx_std_17)
  set_target_properties(gating_${name} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden)
  target_compile_options(gating_${name} PRIVATE -O3 ${gating_options} ${ARGN})
  target_compile_definitions(gating_${name} PRIVATE MOECOMM_KERNELS=kernels_${name})
  target_sources(_core PRIVATE $<TARGET_OBJECTS:gating_${name}>)
endfunction()

target_sources(_core PRIVATE cpu/gating.cpp cpu/gating_bindings.cpp)
set_source_files_properties(cpu/gating.cpp PROPERTIES COMPILE_OPTIONS "${gating_options}")
gating_kernels(baseline)
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64")
  set_property(SOURCE cpu/gating.cpp APPEND PROPERTY COMPILE_DEFINITIONS MOECOMM_X86)
  gating_kernels(avx2 -mavx2 -mfma -mf16c)
  gating_kernels(avx512 -mavx512f -mavx512dq -mavx512bw -mavx512vl -mfma -mf16c -mprefer-vector-width=512)
endif()
find_package(Threads REQUIRED)
target_link_libraries(_core PRIVATE Threads::Threads)
