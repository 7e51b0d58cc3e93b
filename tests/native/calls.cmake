# Programs that make whole calls without Python, also under sanitizers, fuzzers and emulators.
add_library(selfattn_attend_case STATIC arrays.cpp attend_case.cpp)
target_link_libraries(selfattn_attend_case PUBLIC selfattn_core)
target_compile_options(selfattn_attend_case PRIVATE ${SELFATTN_WARNINGS})

add_executable(stress_threads stress_threads.cpp stress_cases.cpp)
target_link_libraries(stress_threads PRIVATE selfattn_attend_case)
target_compile_options(stress_threads PRIVATE ${SELFATTN_WARNINGS})
add_test(NAME stress_threads COMMAND stress_threads 2)

# Keys and values in the forms in which caches hold them.
add_library(selfattn_cached_case STATIC cached_case.cpp definition.cpp)
target_link_libraries(selfattn_cached_case PUBLIC selfattn_attend_case native_checks)
target_compile_options(selfattn_cached_case PRIVATE ${SELFATTN_WARNINGS})
add_executable(cached_checks cached_checks.cpp)
target_link_libraries(cached_checks PRIVATE selfattn_cached_case)
target_compile_options(cached_checks PRIVATE ${SELFATTN_WARNINGS})
foreach(isa IN LISTS isas)
  add_test(NAME cached_checks_${isa} COMMAND cached_checks ${isa})
  set_tests_properties(cached_checks_${isa} PROPERTIES SKIP_RETURN_CODE ${skipped})
endforeach()

# Steps on a cache. They do not depend on the instruction set, so the test runs once.
add_executable(cache_step_checks cache_step_checks.cpp page_checks.cpp stage_checks.cpp)
target_link_libraries(cache_step_checks PRIVATE selfattn_attend_case native_checks)
target_compile_options(cache_step_checks PRIVATE ${SELFATTN_WARNINGS})
add_test(NAME cache_step_checks COMMAND cache_step_checks)

# The fuzzer's target; `replay` runs it over a corpus without a fuzzer.
add_library(selfattn_fuzz_case STATIC fuzz_case.cpp fuzz_shapes.cpp)
target_link_libraries(selfattn_fuzz_case PUBLIC selfattn_cached_case)
target_compile_options(selfattn_fuzz_case PRIVATE ${SELFATTN_WARNINGS})
add_executable(replay replay.cpp fuzz_attend.cpp)
target_link_libraries(replay PRIVATE selfattn_fuzz_case)
target_compile_options(replay PRIVATE ${SELFATTN_WARNINGS})
add_test(NAME replay COMMAND replay ${CMAKE_CURRENT_SOURCE_DIR}/corpus)
if(SELFATTN_SANITIZE MATCHES "fuzzer-no-link")
  add_executable(fuzz_attend fuzz_attend.cpp)
  target_link_libraries(fuzz_attend PRIVATE selfattn_fuzz_case)
  target_link_options(fuzz_attend PRIVATE -fsanitize=fuzzer)
endif()

if(SELFATTN_EMULATE_AMX)
  add_executable(emulation emulation.cpp)
  target_link_libraries(emulation PRIVATE selfattn_attend_case)
  target_compile_options(emulation PRIVATE ${SELFATTN_WARNINGS})
  add_test(NAME emulation COMMAND emulation)
  set_tests_properties(emulation PROPERTIES SKIP_RETURN_CODE ${skipped})
endif()
