// The charts of one or several jobs over each other.

import { Chart } from "./chart.js";
import { duration, el, grouped, number } from "./text.js";

const AXES = { step: grouped, time: (hours) => (hours > 0 ? duration(hours * 3600) : "0 s"), tokens: (count) => `${number(count / 1e6, 3)} M` };

// `sources` is [{name, curves}].
export function panels(sources) {
  let axis = "step";
  const charts = [
    { chart: new Chart({ title: "Training loss" }), field: "loss" },
    { chart: new Chart({ title: "Evaluation loss" }), field: null },
    { chart: new Chart({ title: "Learning rate", format: (value) => (value === 0 ? "0" : Number.isFinite(value) ? value.toExponential(1) : "-") }), field: "learning_rate" },
    { chart: new Chart({ title: "Tokens per second", format: grouped }), field: "tokens_per_second" },
    { chart: new Chart({ title: "Gradient norm" }), field: "grad_norm" },
  ];
  const draw = () => {
    for (const { chart, field } of charts) {
      chart.axis = AXES[axis];
      const series = sources.map(({ name, curves }, index) => ({ name, index,
        points: field ? curves.points(field, axis) : curves.evalPoints(axis), dots: !field }));
      chart.set(series, sources.length === 1 ? sources[0].curves.marks(axis) : []);
    }
  };
  const buttons = Object.keys(AXES).map((name) => el("button", { type: "button", "aria-pressed": String(name === axis), onclick: (event) => {
    axis = name;
    for (const button of buttons) button.setAttribute("aria-pressed", String(button === event.currentTarget));
    draw();
  } }, name));
  const bar = el("div", { className: "bar", role: "group", "aria-label": "Horizontal axis" }, el("span", { className: "soft" }, "over"), buttons);
  return {
    nodes: [bar, el("div", { className: "charts" }, charts.map(({ chart }) => chart.node))],
    draw,
    close: () => charts.forEach(({ chart }) => chart.close()),
  };
}
