"""The built-in prompts of `specqd bench`: long answers, various subjects, and some text for the prefill."""

__all__ = ["PASSAGE", "PROMPTS"]

PROMPTS = (
    "Explain how rainbows form, step by step, to a class of ten-year-olds who have only seen one once.",
    "Write a short story about a lighthouse keeper who finds a letter in a bottle on a stormy night.",
    "Describe the main causes of the First World War and how they worked together in the summer of 1914.",
    "Write a Python function that checks whether a string is a palindrome, and explain each line of it.",
    "Give me a recipe for vegetable soup with carrots and beans, with the amounts and the steps in order.",
    "What are the differences between a virus and a bacterium, and why does that matter for medicine?",
    "Write a polite letter to a landlord who has not repaired the heating for three weeks in winter.",
    "Explain the theory of supply and demand with the example of a small market that sells apples.",
    "Plan a three-day trip to a city by the sea for a family with two small children and little money.",
    "Describe how a bill becomes a law in a parliament with two chambers, naming each of the stages.",
    "Write a dialogue between a doctor and a patient who sleeps badly and drinks a lot of coffee.",
    "Explain what photosynthesis is, which substances go in and come out, and where it happens in a leaf.",
    "List ten ways to save electricity at home and say for each of them why it works and what it costs.",
    "Tell the story of a dog that gets lost in the mountains and how it finds its way back to the village.",
    "Explain to a beginner how a computer stores numbers in binary, and convert 13 and 42 as examples.",
    "Write a speech of one minute for the opening of a new public library in a town of farmers.",
    "Compare living in a big city with living in the country: work, health, friends, cost and quiet.",
    "Describe the water cycle and what happens to a drop of rain that falls on a mountain in spring.",
    "Write a poem of four verses about autumn leaves, the smell of rain and an old wooden bridge.",
    "Explain how vaccines train the immune system, and why some of them have to be given twice.",
    "Write an SQL query that finds the customers with more than five orders last year, and explain it.",
    "Give advice to a student who wants to learn a new language in one year beside a full-time job.",
    "Summarise the life of a honeybee from the egg to the forager and the tasks it has at each age.",
    "Explain the difference between weather and climate, and how scientists measure each of the two.",
    "Write instructions for a bicycle tyre repair: what tools are needed and what to do in which order.",
    "Describe the planets of the solar system in order from the Sun, with one fact about each of them.",
)

PASSAGE = (
    "The harbour lay quiet when the first boats came back. Nets were carried up the steps, the scales "
    "were cleaned, and someone had already lit the stove in the hut at the end of the pier. Nobody spoke "
    "about the storm. It had passed north of the island in the night, and the only sign of it was a line "
    "of weed along the wall, far above the usual mark. Later the teacher came down with her class and let "
    "the children look for shells. She explained how the tide is pulled by the Moon and held back by the "
    "shape of the coast, why the water is highest twice a day, and what the fishermen had to know before "
    "there were tables in print. "
)
