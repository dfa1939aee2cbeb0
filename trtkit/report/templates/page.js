// The page is whole without this: it only sorts, filters and opens.
(function () {
  "use strict";
  var table = document.querySelector(".problems");
  var controls = document.querySelector(".controls");
  if (!table || !controls) { return; }
  var bodies = Array.prototype.slice.call(table.tBodies);
  var sort = document.getElementById("sort");
  var show = document.getElementById("show");
  var open = document.getElementById("open");
  var shown = document.getElementById("shown");
  function number(body, name) { return parseFloat(body.getAttribute("data-" + name)); }
  function apply() {
    var by = sort.value.split(" ");
    var sign = by[1] === "down" ? -1 : 1;
    bodies.sort(function (a, b) {
      return sign * (number(a, by[0]) - number(b, by[0])) || number(a, "order") - number(b, "order");
    });
    var count = 0;
    bodies.forEach(function (body) {
      table.appendChild(body);
      var states = body.getAttribute("data-states").split(" ");
      body.hidden = show.value === "differ" ? states.length < 2 : show.value !== "all" && states.indexOf(show.value) < 0;
      count += body.hidden ? 0 : 1;
    });
    shown.textContent = count + " of " + bodies.length + " shown";
  }
  sort.addEventListener("change", apply);
  show.addEventListener("change", apply);
  open.addEventListener("click", function () {
    var all = table.querySelectorAll("details");
    var closed = Array.prototype.some.call(all, function (one) { return !one.open; });
    Array.prototype.forEach.call(all, function (one) { one.open = closed; });
    open.textContent = closed ? "Close all" : "Open all";
  });
  controls.hidden = false;
  apply();
})();
