# Warnings for our own code; third-party headers come in as SYSTEM.
function(sb_warnings target)
  target_compile_options(${target} PRIVATE
    $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra -Wshadow -Wno-unused-parameter>)
endfunction()

# Flags of a per-ISA kernel file, by its name: x86_avx2*.cc, x86_avx512*.cc, x86_avx512_vnni*.cc.
# Contraction is off everywhere (see target subbyte_core): kernels that fuse say so with an intrinsic.
function(sb_isa_flags source)
  get_filename_component(name ${source} NAME)
  set(avx2 -mavx2 -mfma -mf16c -mbmi -mbmi2)
  set(avx512 ${avx2} -mavx512f -mavx512bw -mavx512dq -mavx512vl -mavx512vbmi -mprefer-vector-width=512)
  set(vnni ${avx512} -mavx512vnni -mavx512vbmi2 -mavx512bitalg -mavx512vpopcntdq)
  if(name MATCHES "^x86_avx512_vnni")
    set(flags ${vnni})
  elseif(name MATCHES "^x86_avx512")
    set(flags ${avx512})
  elseif(name MATCHES "^x86_avx2")
    set(flags ${avx2})
  else()
    return()
  endif()
  # Kernels throw nothing: without the tables of exceptions their objects hold no weak symbol. The intrinsics of g++ 12 warn about
  # the undefined lanes they are made of.
  list(APPEND flags -fno-exceptions $<$<CXX_COMPILER_ID:GNU>:-Wno-maybe-uninitialized>)
  if(SB_BUILD_FUZZ)
    list(APPEND flags -fno-sanitize=all)  # parsers are fuzzed; instrumenting kernels they never call takes minutes
  endif()
  set_source_files_properties(${source} PROPERTIES COMPILE_OPTIONS "${flags}")
endfunction()
