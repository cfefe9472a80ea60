// A triangle of weights on a canvas: rows are the tokens that look, columns those that they look at.

const LABEL = 88; // CSS pixels of the names beside the matrix, where cells are high enough for them
const LEGIBLE = 13; // height of a cell from which it gets a name
const LARGEST = 34; // of a cell

/** Where the cells lie, for so many tokens in a canvas of this width. */
function layout(width, count) {
  const named = (width - LABEL) / count >= LEGIBLE;
  const margin = named ? LABEL : 0;
  const cell = Math.min(LARGEST, (width - margin) / count);
  return { named, margin, cell, size: margin + cell * count };
}

/**
 * @param {HTMLCanvasElement} canvas
 * @param {{rows: number[][], most: number, names: string[], at: {row: number, column: number|null}}} picture
 * Row t has t + 1 weights; `most` is drawn darkest; `names` are of the tokens; `at` is what is pointed at.
 */
export function draw(canvas, { rows, most, names, at }) {
  const width = canvas.parentElement.clientWidth;
  const plan = layout(width, rows.length);
  const ratio = window.devicePixelRatio;
  canvas.width = Math.round(plan.size * ratio);
  canvas.height = Math.round(plan.size * ratio);
  canvas.style.setProperty("width", `${plan.size}px`);
  canvas.style.setProperty("height", `${plan.size}px`);
  const pen = canvas.getContext("2d");
  pen.scale(ratio, ratio);
  const colour = (name) => getComputedStyle(canvas).getPropertyValue(name);
  pen.imageSmoothingEnabled = false;
  pen.drawImage(cells(rows, most, colour), plan.margin, plan.margin, plan.cell * rows.length, plan.cell * rows.length);
  if (plan.named) labels(pen, plan, names, at, colour);
  cursor(pen, plan, at, colour);
}

let painted = { rows: null, heat: "", image: null }; // the cells stay while only the cursor moves

/** The cells, a pixel each. */
function cells(rows, most, colour) {
  const heat = colour("--heat-full");
  if (painted.rows === rows && painted.heat === heat) return painted.image;
  const image = new OffscreenCanvas(rows.length, rows.length);
  const pen = image.getContext("2d");
  rows.forEach((weights, row) => {
    pen.globalAlpha = 1;
    pen.fillStyle = colour("--panel");
    pen.fillRect(0, row, weights.length, 1);
    pen.fillStyle = heat;
    weights.forEach((weight, column) => {
      pen.globalAlpha = Math.min(1, weight / most);
      pen.fillRect(column, row, 1, 1);
    });
  });
  painted = { rows, heat, image };
  return image;
}

function labels(pen, { margin, cell }, names, at, colour) {
  pen.textBaseline = "middle";
  names.forEach((name, number) => {
    const short = name.length > 11 ? `${name.slice(0, 10)}…` : name;
    const middle = margin + (number + 0.5) * cell;
    const write = (pointed, x, y) => {
      pen.font = `${pointed ? "bold " : ""}12px ui-monospace, "DejaVu Sans Mono", monospace`;
      pen.fillStyle = colour(pointed ? "--text" : "--soft");
      pen.fillText(short, x, y);
    };
    pen.textAlign = "right";
    write(number === at.row, margin - 6, middle);
    pen.save();
    pen.translate(middle, margin - 6);
    pen.rotate(-Math.PI / 2);
    pen.textAlign = "left";
    write(number === at.column, 0, 0);
    pen.restore();
  });
}

function cursor(pen, { margin, cell }, { row, column }, colour) {
  pen.strokeStyle = colour("--focus");
  pen.lineWidth = 1.5;
  pen.strokeRect(margin, margin + row * cell, cell * (row + 1), cell);
  if (column === null) return;
  pen.lineWidth = 3;
  pen.strokeRect(margin + column * cell, margin + row * cell, cell, cell);
}

/** The cell under the pointer, or null beside the matrix. */
export function placeOf(canvas, event, count) {
  const { margin, cell } = layout(canvas.parentElement.clientWidth, count);
  const row = Math.floor((event.offsetY - margin) / cell);
  const column = Math.floor((event.offsetX - margin) / cell);
  return row >= 0 && column >= 0 && row < count && column < count ? { row, column } : null;
}
