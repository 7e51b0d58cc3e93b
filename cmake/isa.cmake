# add_isa(name flags...): compiles csrc/kernels/isa_<name>.cpp with the flags of that instruction set and no others.
function(add_isa name)
  set_property(GLOBAL APPEND PROPERTY SELFATTN_ISAS ${name})
  set_property(GLOBAL PROPERTY SELFATTN_ISA_FLAGS_${name} ${ARGN})
  add_isa_objects(selfattn_${name} ${name} ${PROJECT_SOURCE_DIR}/csrc/kernels/isa_${name}.cpp)
  target_link_libraries(selfattn_core PUBLIC $<TARGET_OBJECTS:selfattn_${name}>)
endfunction()

# add_isa_objects(target isa sources...): an object library for one instruction set. No exceptions and no link-time
# optimisation: no code in these files may be merged with code for another CPU.
function(add_isa_objects target isa)
  get_property(flags GLOBAL PROPERTY SELFATTN_ISA_FLAGS_${isa})
  add_library(${target} OBJECT ${ARGN})
  target_include_directories(${target} PRIVATE ${PROJECT_SOURCE_DIR}/csrc)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_options(${target} PRIVATE ${SELFATTN_WARNINGS} ${flags} -ffp-contract=off -fno-math-errno
    -fno-trapping-math -fno-exceptions -fno-lto)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 headers trigger these warnings. Outside x86, GCC by default schedules instructions before it
    # allocates registers. That moves all loads of a step to its beginning, and sums are spilled to make room for them.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized -Wno-uninitialized -fno-schedule-insns)
  endif()
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
endfunction()
