# add_isa(name flags...): compiles csrc/kernels/isa_<name>.cpp with the flags of that instruction set and no others.
# No exceptions and no link-time optimisation: nothing of such a file may be merged with code for another CPU.
function(add_isa name)
  set(target selfattn_${name})
  add_library(${target} OBJECT csrc/kernels/isa_${name}.cpp)
  target_include_directories(${target} PRIVATE csrc)
  target_compile_features(${target} PRIVATE cxx_std_20)
  target_compile_options(${target} PRIVATE ${SELFATTN_WARNINGS} ${ARGN} -ffp-contract=off -fno-math-errno
    -fno-trapping-math -fno-exceptions -fno-lto)
  if(CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    # GCC's own AVX-512 headers trip this warning.
    target_compile_options(${target} PRIVATE -Wno-maybe-uninitialized -Wno-uninitialized)
  endif()
  set_target_properties(${target} PROPERTIES POSITION_INDEPENDENT_CODE ON CXX_VISIBILITY_PRESET hidden
    VISIBILITY_INLINES_HIDDEN ON)
  target_link_libraries(selfattn_core PUBLIC $<TARGET_OBJECTS:${target}>)
endfunction()
