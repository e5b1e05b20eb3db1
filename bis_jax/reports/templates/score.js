// Sends the form to /score and shows a coloured step for each score.
const at = (id) => document.getElementById(id);
let images = [];

function showImages() {
  at("images").replaceChildren(
    ...images.map((source) => Object.assign(new Image(), { src: source, alt: "" })),
  );
}

async function addFiles(files) {
  for (const file of files) {
    if (!file.type.startsWith("image/")) continue;
    images.push(
      await new Promise((resolve, reject) => {
        const reader = new FileReader();
        reader.onload = () => resolve(reader.result);
        reader.onerror = () => reject(reader.error);
        reader.readAsDataURL(file);
      }),
    );
  }
  showImages();
}

function element(kind, name, text) {
  return Object.assign(document.createElement(kind), { className: name, textContent: text });
}

function showScores(steps, scores) {
  at("steps").replaceChildren(
    ...scores.map((score, i) => {
      const step = element("li", "step", "");
      step.style.setProperty("--score", score.toFixed(4));
      const marks = element("span", "marks", "");
      marks.append(element("span", "score", score.toFixed(2)));
      step.append(element("span", "text", steps[i]), marks);
      return step;
    }),
  );
  const product = scores.reduce((all, score) => all * score, 1);
  const mean = scores.reduce((all, score) => all + score, 0) / scores.length;
  const shown = { min: Math.min(...scores), product, last: scores.at(-1), mean };
  at("aggregates").textContent = Object.entries(shown)
    .map(([name, value]) => `${name} ${value.toFixed(3)}`)
    .join("   ");
}

async function score() {
  at("state").textContent = "Scoring ...";
  at("score").disabled = true;
  try {
    const answer = await fetch("score", {
      method: "POST",
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        question: at("question").value,
        response: at("solution").value,
        images,
      }),
    });
    const found = await answer.json();
    if (!answer.ok) throw new Error(found.error);
    showScores(found.steps, found.scores);
    at("state").textContent = "";
  } catch (error) {
    at("state").textContent = error.message;
  } finally {
    at("score").disabled = false;
  }
}

const drop = document.querySelector(".drop");
document.querySelector(".score-form").addEventListener("submit", (event) => {
  event.preventDefault();
  score();
});
at("files").addEventListener("change", (event) => addFiles(event.target.files));
at("clear").addEventListener("click", () => {
  images = [];
  at("files").value = "";
  showImages();
});
drop.addEventListener("keydown", (event) => event.key === "Enter" && at("files").click());
for (const kind of ["dragover", "dragleave", "drop"]) {
  document.addEventListener(kind, (event) => {
    event.preventDefault();
    drop.classList.toggle("over", kind === "dragover");
    if (kind === "drop") addFiles(event.dataTransfer.files);
  });
}
document.addEventListener("paste", (event) => {
  if (event.clipboardData.files.length) addFiles(event.clipboardData.files);
});
